from torch import nn


class LMHead(nn.Module):
    def __init__(self, model, settings):
        super().__init__()
        self.model = model
        self.create_cache = model.create_cache
        self.compute_train_extra_args = model.compute_train_extra_args
        self.embed_tokens = nn.Embedding(settings["vocab_size"], settings["hidden_size"])
        self.lm_head = nn.Linear(settings["hidden_size"], settings["vocab_size"])

    def forward(self, carry, batch, **kwargs):
        rest = {name: value for name, value in batch.items() if name != "inputs"}
        _, z = self.model(carry, self.embed_tokens(batch["inputs"]), **rest, **kwargs)
        return None, self.lm_head(z)
