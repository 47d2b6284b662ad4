"""What ``train_pair.py`` is made of: text, models, training, evaluation."""
