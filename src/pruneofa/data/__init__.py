"""Corpora and task data as token ids. Needs the train extra."""

from pruneofa.errors import need_train_extra

need_train_extra()
