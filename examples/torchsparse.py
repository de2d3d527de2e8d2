"""Sparse convolution: find the boxes that stand on a slope, from the sites of their surfaces alone.

Height alone does not tell: a network must look around. `benchmarks/torchsparse_lidar.py` does this with LiDAR scans.
"""

import torch
from torch import nn

import pronghorn.torchsparse as ts

SIZE, HEIGHT = 32, 20


def sample(generator: torch.Generator) -> tuple[ts.SparseTensor, torch.Tensor]:
    """Surface of a slope with four boxes, 32 x 32 sites of a grid of 32 x 32 x 20; and whether each is a box's."""
    x, y = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    slopes = torch.rand(2, generator=generator) * 0.2
    z = 2 + (slopes[0] * x + slopes[1] * y).int()
    label = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for _ in range(4):
        a, b, wide, deep = torch.randint(4, 9, (4,), generator=generator) * torch.tensor([3, 3, 1, 1])
        label[a : a + wide, b : b + deep] = 1
    coords = torch.stack([torch.zeros_like(x), x, y, z + 2 * label], dim=-1).view(-1, 4).int()
    # Columns: batch index, x, y, z. The range is what a strided layer needs to know where the grid ends.
    return ts.SparseTensor(torch.ones(len(coords), 1), coords, spatial_range=(1, SIZE, SIZE, HEIGHT)), label.flatten()


class Segmenter(nn.Module):
    """A U-Net of sparse convolutions, then a linear layer at each site."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ts.backbones.SparseResUNet(8, [8, 16], [16, 8], in_channels=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: ts.SparseTensor) -> torch.Tensor:
        return self.head(self.backbone(x)[-1].feats)


def main() -> None:
    generator = torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(25):
        x, label = sample(generator)
        loss = nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    with torch.no_grad():
        x, label = sample(generator)
        right = model.eval()(x).argmax(1) == label
    for name, of in (("floor", 0), ("boxes", 1)):
        print(f"a new slope's {name}: {right[label == of].sum()} of {(label == of).sum()} sites right")


if __name__ == "__main__":
    main()
