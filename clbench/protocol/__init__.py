"""Two-phase hyperparameter protocol and sweeps: many runs, on one machine or on a Ray cluster.

Choose hyperparameters on one scenario, freeze the choice, score it on another (`two_phase_protocol` card):

`space` what is searched and how trials are drawn; `search` which trials run, in which order; `pairs` the two scenarios
and what they share; `jobs` one run as data; `engines` where runs run; `study` tune and freeze; `evaluation` score what
is frozen; `sweep` any grid; `analysis` and `tables` what came out; `track` MLflow.

Importing the package imports neither torch, ray nor optuna.
"""
