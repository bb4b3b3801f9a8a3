"""Run records -> a leaderboard: one self-contained page, and the same tables as Markdown, CSV and LaTeX.

records    what lies in the folders, what is left out and why
boards     which runs may be compared, and what a row of a table is
provenance where a row's hyperparameters come from
beside     published numbers next to ours
statistics paired tests, critical differences
curves     curves, matrices and confusions, small enough for a page
tables     Markdown, CSV, LaTeX
page       the HTML page, from the files in `assets`
write      all of it into a folder
"""

from clbench.report.leaderboard.write import Written, write_report

__all__ = ["Written", "write_report"]
