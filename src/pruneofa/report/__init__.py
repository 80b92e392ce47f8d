"""The table, the model card and the report of a run. Needs the train extra."""

from pruneofa.errors import need_train_extra

need_train_extra()
