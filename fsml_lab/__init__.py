"The whole loop of a machine-learning product in one importable, Jupyter-first library."
__version__ = "0.1.0"
