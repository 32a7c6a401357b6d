"""The data sets of `bench_tables.py`, and what others make of them; run in the peers' own environment.

python tools/table_peers.py write FOLDER              # every set as CSV, with what a recipe needs to know of it
python tools/table_peers.py score CSV LABEL SEED FOLDER   # splits it into FOLDER, and prints how each peer does
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from palmerpenguins import load_penguins
from pytorch_tabnet.tab_model import TabNetClassifier, TabNetRegressor
from sklearn import datasets
from sklearn.compose import make_column_transformer
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

MEANS = 10  # of the 30 columns of breast cancer: the others are errors and extremes of these
# Of the diabetes data (Efron et al. 2004); its columns go by short names.
DIABETES = {
    "bmi": "body mass index", "bp": "blood pressure", "s1": "total cholesterol", "s2": "LDL cholesterol",
    "s3": "HDL cholesterol", "s4": "ratio of total cholesterol to HDL", "s5": "log of triglycerides",
    "s6": "blood sugar", "target": "disease progression",
}  # fmt: skip
PENGUINS = {"bill_length_mm": "bill length (mm)", "bill_depth_mm": "bill depth (mm)",
            "flipper_length_mm": "flipper length (mm)", "body_mass_g": "body mass (g)"}  # fmt: skip


def tables() -> dict[str, tuple[pd.DataFrame, str]]:
    """Return every set, and the column that is asked for."""
    found = {}
    for name, label in (("iris", "species"), ("wine", "cultivar"), ("breast_cancer", "diagnosis")):
        loaded = getattr(datasets, f"load_{name}")(as_frame=True)
        frame = loaded.data.iloc[:, :MEANS] if name == "breast_cancer" else loaded.data
        words = ["first", "second", "third"] if name == "wine" else list(loaded.target_names)
        found[name] = (frame.assign(**{label: [words[at] for at in loaded.target]}), label)
    penguins = load_penguins().dropna().rename(columns=PENGUINS).drop(columns="year")
    found["penguins"] = (penguins, "species")
    diabetes = datasets.load_diabetes(as_frame=True, scaled=False).frame.rename(columns=DIABETES)
    diabetes["sex"] = diabetes["sex"].map({1.0: "male", 2.0: "female"}).fillna("")
    found["diabetes"] = (diabetes, DIABETES["target"])
    return found


def write(folder: Path) -> None:
    """Write every set once, without rows that stand there twice."""
    about = {}
    for name, (frame, label) in tables().items():
        frame.drop_duplicates(subset=[column for column in frame if column != label]).to_csv(
            folder / f"{name}.csv", index=False
        )
        about[name] = {"label": label, "range": None}
        if name == "diabetes":
            about[name]["range"] = [float(frame[label].min()), float(frame[label].max())]
    (folder / "sets.json").write_text(json.dumps(about))


def divide(source: Path, label: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return 70 % and 30 % of the rows, classes in like shares."""
    frame = pd.read_csv(source, keep_default_na=False)
    classes = None if frame[label].dtype.kind in "if" else frame[label]
    return tuple(train_test_split(frame, test_size=0.3, random_state=seed, stratify=classes))


def score(train: pd.DataFrame, test: pd.DataFrame, label: str, seed: int) -> dict[str, float]:
    """Return the share of right answers of each peer, or its mean absolute error."""
    numbers = train[label].dtype.kind in "if"
    words = [column for column in train if column != label and train[column].dtype.kind not in "if"]
    plain = [column for column in train if column != label and column not in words]
    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), words), (StandardScaler(), plain)
    )
    boosting = GradientBoostingRegressor if numbers else GradientBoostingClassifier
    peers: dict[str, Any] = {
        "linear": make_pipeline(columns, LinearRegression() if numbers else LogisticRegression(max_iter=2000)),
        "boosting": make_pipeline(columns, boosting(random_state=seed)),
    }
    found = {}
    for name, peer in peers.items():
        peer.fit(train.drop(columns=label), train[label])
        found[name] = _measure(peer.predict(test.drop(columns=label)), test[label].to_numpy(), numbers)
    before, after = columns.fit_transform(train.drop(columns=label)), columns.transform(test.drop(columns=label))
    made = (TabNetRegressor if numbers else TabNetClassifier)(seed=seed, verbose=0)
    answers = train[label].to_numpy()
    made.fit(before, answers.reshape(-1, 1).astype(float) if numbers else answers, max_epochs=200, batch_size=64,
             virtual_batch_size=32, drop_last=False)  # fmt: skip
    found["tabnet"] = _measure(np.ravel(made.predict(after)), test[label].to_numpy(), numbers)
    return found


def _measure(said: np.ndarray, right: np.ndarray, numbers: bool) -> float:
    return float(np.abs(said - right).mean()) if numbers else float((said == right).mean())


def main() -> None:
    """Do what is asked."""
    what, *given = sys.argv[1:]
    if what == "write":
        write(Path(given[0]))
        return
    source, label, seed, folder = Path(given[0]), given[1], int(given[2]), Path(given[3])
    train, test = divide(source, label, seed)
    train.to_csv(folder / "train.csv", index=False)
    test.to_csv(folder / "test.csv", index=False)
    print(json.dumps(score(train, test, label, seed)))


if __name__ == "__main__":
    main()
