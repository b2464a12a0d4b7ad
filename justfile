# PYTHONSAFEPATH keeps this folder's `kernels` from standing before packages of that name.
export PYTHONSAFEPATH := "1"
export HF_HUB_OFFLINE := "1"

default: lint test

# run the tests; arguments go to pytest
test *args:
    python -m pytest {{args}}

# style and types, without changing anything
lint:
    ruff check .
    ruff format --check .
    mypy

# repair what can be repaired
fix:
    ruff check --fix .
    ruff format .

# every recipe at several budgets on held-out prompts
bench *args:
    python benchmarks/recipes.py {{args}}
