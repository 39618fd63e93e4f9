"""Run by torchrun in test_parallel.py: training runs one after another, each a dict of TrainConfig's fields."""

import json
import sys
from pathlib import Path

import torch

import train
from engine import distributed

torch.set_num_threads(1)
for options in json.loads(Path(sys.argv[1]).read_text()):
    train.train(train.TrainConfig(**options))
distributed.shutdown()
