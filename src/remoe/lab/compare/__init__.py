"""`remoe compare`: many training runs from one experiment file, and the tables and figures that compare them.

experiment (which runs) -> pool (which exist) -> runner (trains the rest) -> results (numbers) -> tables, output.
Nothing here trains a model: each run is a `remoe train` in a process of its own.
"""
