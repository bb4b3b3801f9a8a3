"""The only training loop, and what turns a run's specification into a finished record."""
