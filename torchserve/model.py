"""The classifier as a PyTorch module: raw features in, probabilities out.

TorchServe imports this file from the archive and creates an instance of its class, so there must be exactly
one class here. The `.pth` in the archive holds the instance's state dict: the weights and the two buffers.
"""

import torch
from torch import nn

FEATURES = 5  # mean radius, mean texture, mean smoothness, mean concavity, mean symmetry


class Classifier(nn.Module):
    """Standardise -> 64 ReLU -> 32 ReLU -> 1 logit -> sigmoid."""

    def __init__(self):
        super().__init__()
        # Buffers are stored in the state dict but not trained; with them clients can send raw features.
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the log-odds of benign (n,) for raw features (n, 5); the training loss takes these."""
        return self.layers((rows - self.mean) / self.scale).squeeze(1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the probabilities (n, 2), [P(malignant), P(benign)], for raw features (n, 5)."""
        logits = self.logits(rows)  # (n,)
        return torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], dim=1)  # (n, 2)
