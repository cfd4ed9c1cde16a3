"""The study: which mode of training to take, for whom, at which price (docs/study.md).

``python -m benchmarks.study`` trains every mode on every setting, in three stages. It goes on where it stopped.

1. Search. Each mode gets the same number of trials over learning rate, batch size, weight decay and its own radius, on
   seeds that the report does not use. The validation set chooses.
2. Equal epochs. The best trial of each mode is trained again on new seeds, and measured on the test set.
3. Equal time. The same, for as many epochs as SAM's time allows at the mode's counted cost.
"""
