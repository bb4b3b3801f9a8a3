"""Runs in MLflow. The record on disk is the source of truth; a tracking server holds a copy of it, and may fail.

`runs` copies records and notes what could not be copied; `client` is the few calls of MLflow; `cli` is `clbench sync`.
"""
