"""What the experiments share: settings from YAML, resumable training, results.

`plan` reads a YAML file, `training` takes one run through its steps, `command` is the command line
over all runs, `results` the table and the plot. `vision`, `language` and `graph` are the models.
"""
