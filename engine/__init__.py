"""How a training run is carried out."""
