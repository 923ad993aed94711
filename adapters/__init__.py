"""Model families and foreign repositories on the public names of deq_phantom_plugin."""
