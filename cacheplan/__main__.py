"""`python -m cacheplan`: the same as the script `cacheplan`."""

from cacheplan.cli import main

main()
