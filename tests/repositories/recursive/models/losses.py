from torch import nn
from torch.nn import functional as F


class ACTLossHead(nn.Module):
    def __init__(self, model, loss_type):
        super().__init__()
        self.model = model

    def initial_carry(self, batch):
        return self.model.initial_carry(batch)

    def forward(self, return_keys, carry, batch):
        carry, outputs = self.model(carry, batch)
        loss = F.cross_entropy(outputs["logits"].transpose(1, 2), batch["labels"])
        return carry, loss + outputs["q_halt_logits"].square().mean(), {}, {}, False
