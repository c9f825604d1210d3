"""`remoe compare`: many training runs from one experiment file, and the tables and figures that compare them.

experiment (what to run) -> pool (what has been run) -> runner (runs it) -> results (numbers) -> report (tables),
figures. Nothing here trains: every run is a `remoe train` of its own.
"""
