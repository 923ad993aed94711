from dataclasses import dataclass


@dataclass
class Config:
    block_size: int
    vocab_size: int
    n_embd: int
    num_attention_heads: int
    intermediate_size: int
    padding_multiple: int = 1
    n_backbone_layers: int = 1
    norm_class_name: str = "RMSNorm"
    nonlin_name: str = "GELU"
    tie_embeddings: bool = False
    solver: str = "fpi"
    max_iter: int = 12
    tol: float = 1e-3
