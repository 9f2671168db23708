"""What the commands do, as functions: teach, distill, evaluate, export, bench, run.

Each takes plain values, leaves its results in a folder and returns a frozen
dataclass; the command line only parses flags and prints.
"""
