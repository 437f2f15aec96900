"""Two moons, and the same turned: a classifier of the first, before and after transport; writes images/adaptation.png.

python docs/compat/domain_adaptation.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt
from sklearn.datasets import make_moons
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from sbot.compat.sklearn import BridgeClassifier, BridgeTransport

X, y = make_moons(200, noise=0.08, random_state=0)
Z, z = make_moons(200, noise=0.08, random_state=1)
angle = np.deg2rad(50)
Z = Z @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

plain = SVC(gamma=2.0).fit(X, y)
known = np.random.default_rng(0).permutation(200)[:20]  # a few labels of the target, to choose eps by
search = GridSearchCV(
    BridgeClassifier(SVC(gamma=2.0), target=Z),
    {"eps": ["auto", 0.003, 0.01, 0.1, 1.0]},
    cv=[(np.arange(200), 200 + np.arange(20))],
    refit=False,
).fit(np.vstack([X, Z[known]]), np.hstack([y, z[known]]))
adapted = BridgeClassifier(SVC(gamma=2.0), target=Z, **search.best_params_).fit(X, y)
bridge = BridgeTransport(target=Z, **search.best_params_).fit(X)

fig, axes = plt.subplots(1, 3, figsize=(12, 4), sharex=True, sharey=True)
grid = np.stack(np.meshgrid(np.linspace(-2, 2.5, 200), np.linspace(-1.5, 2.5, 200)), -1)
for axis, model, title in ((axes[0], plain, "before"), (axes[2], adapted, "after")):
    axis.contourf(
        *grid.transpose(2, 0, 1), model.predict(grid.reshape(-1, 2)).reshape(200, 200), alpha=0.2, cmap="coolwarm"
    )
    axis.scatter(*Z.T, c=z, s=8, cmap="coolwarm")
    axis.set_title(f"{title}: {model.score(Z, z):.0%} of the target")
for t in (0, 0.5, 1):
    axes[1].scatter(*bridge.interpolate(X, t).T, c=y, s=8, alpha=0.3 + 0.35 * t, cmap="coolwarm")
axes[1].set_title(f"labelled points on their way, eps = {bridge.eps_:.3g}")
fig.tight_layout()
folder = Path(__file__).parent / "images"
folder.mkdir(exist_ok=True)
fig.savefig(folder / "adaptation.png", dpi=60)
print(f"before {plain.score(Z, z):.3f}, after {adapted.score(Z, z):.3f}, {search.best_params_}")
