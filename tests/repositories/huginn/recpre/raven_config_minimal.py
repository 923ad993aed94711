class Saved:
    def __init__(self, **kwargs):
        vars(self).update(kwargs)


class RavenConfig(Saved):
    def __init__(self, n_embd=4, vocab_size=5, mean_recurrence=6, mean_backprop_depth=2, **kwargs):
        self.n_embd = n_embd
        self.vocab_size = vocab_size
        self.mean_recurrence = mean_recurrence
        self.mean_backprop_depth = mean_backprop_depth
        self.test_time_noise = 0
        super().__init__(**kwargs)
