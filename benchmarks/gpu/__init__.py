"""What ``make gpu`` runs on a machine with a CUDA device: stages that keep what they have, whatever stops them."""
