"""Baselines of a task without a language model, which the encoder should clearly exceed."""

import numpy as np

from pruneofa.data.features import TaskData
from pruneofa.data.tasks import Task
from pruneofa.errors import InputError

WORDS = 50_000  # size of the vocabulary: the most frequent words
FOLDS = 3
CHOICES = {"tfidfvectorizer__stop_words": [None, "english"], "logisticregression__C": [1.0, 4.0, 16.0]}


def baseline(task: Task) -> dict[str, float]:
    """Accuracy in percent of two simple classifiers, learned on the training rows and measured on `validation`.

    Returns:
        {"majority", "bag_of_words"}. The first always predicts the most frequent label of the training rows. The second
        is a logistic regression on TF-IDF weighted words, with both texts of a pair in one bag; stop words and
        regularization are chosen among `CHOICES` by cross-validation on the training rows.

    Raises:
        InputError: the task is not classification, or was loaded without its training rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    train, validation = task.train, task.evaluations[""]
    if train is None or train.targets is None or validation.targets is None or task.kind != "classification":
        raise InputError(f"tasks.{task.name}: a baseline needs a classification task with its training rows")
    majority = np.bincount(train.targets).argmax()
    words = make_pipeline(
        TfidfVectorizer(max_features=WORDS, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"),
        LogisticRegression(C=4.0, max_iter=300),
    )
    if np.unique(train.targets, return_counts=True)[1].min() >= FOLDS:
        words = GridSearchCV(words, CHOICES, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0))
    words.fit(_texts(task, train), train.targets)
    predicted = words.predict(_texts(task, validation))
    return {
        "majority": 100 * float(np.mean(validation.targets == majority)),
        "bag_of_words": 100 * float(np.mean(validation.targets == predicted)),
    }


def _texts(task: Task, data: TaskData) -> list[str]:
    columns = (data.rows.column(name).to_pylist() for name in task.text)
    return [" ".join(texts) for texts in zip(*columns, strict=True)]
