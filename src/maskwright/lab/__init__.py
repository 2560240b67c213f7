"""What claims share: offline data, small models, one training loop, paired verdicts. Imports no room."""
