"""Continual-learning methods, one file each; `clbench list methods` shows them, `clbench check FILE` tests one."""
