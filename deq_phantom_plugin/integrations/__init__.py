"""Callbacks for the trainers of other packages, one file per trainer.

Import a file by its full name: the other package need not be installed otherwise.
"""
