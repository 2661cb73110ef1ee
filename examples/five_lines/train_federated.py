"""Trains a digit classifier on this hospital's data, as it was before there was a federation."""

import gptfl_dist
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, random_split

from network import Network

EPOCHS = 20


class Digits(Dataset):
    def __init__(self, path):
        with np.load(path) as archive:
            self.images = torch.from_numpy(archive["images"]).unsqueeze(1)
            self.labels = torch.from_numpy(archive["labels"])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return (self.images[index] / 255 - 0.5) / 0.5, self.labels[index]


def accuracy(model, data_set):
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(data_set, batch_size=256):
            right += (model(images).argmax(dim=1) == labels).sum().item()
    return right / len(data_set)


torch.manual_seed(0)
torch.set_num_threads(1)
digits = Digits("data/hospital.npz")
train_set, validation_set = random_split(digits, [0.8, 0.2])
loader = DataLoader(train_set, batch_size=32, shuffle=True)
model = Network()
optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
silo = gptfl_dist.join(model, evaluate=lambda: accuracy(model, validation_set))
for epoch in range(1, EPOCHS + 1):
    if not silo.receive():
        break
    model.train()
    for images, labels in loader:
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    print(f"epoch {epoch}: accuracy {accuracy(model, validation_set):.3f}", flush=True)
    silo.deliver(samples=len(train_set))
