"""Follow a plan for the features of a diffusion pipeline; `apply.apply_features` is the entrance.

`program` knows from the plan alone what happens at which step; `executor` follows it call by call
with `blocks` and `parts` between the model and its modules, `store` for what is kept, `values`
for what is put in its place, and `gate` to compute after all.
"""
