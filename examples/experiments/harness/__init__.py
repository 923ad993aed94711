"""What the experiments share: settings from YAML, training that can be resumed, and results.

`plan` reads a YAML file. `training` takes one run through its steps, and `race` lets several runs
take turns. `command` is the command line over all runs. `results` writes the table and the plot.
`vision`, `language`, `graph` and `recursive` hold the models that are trained.
"""
