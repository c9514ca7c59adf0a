"""`python -m tests.bench.tokens`: what guided logits and CLIP's choice do for the models that write codes.

Writes docs/dalle.png, docs/parti.png and docs/tokens.png, and prints the figures of the models' page.
"""

from typing import Any

from PIL import Image

from app.plot import Panel, draw
from models.scoring import Scorer
from tests.bench.cascades import CAPTIONS, SHOWN, agreement
from tests.bench.guided import DOCS, NOTHING, asked, pictures, resident, sheet

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CANDIDATES = (1, 2, 4, 8)
SOME = CAPTIONS[::2]


def row(model: Any, captions: list[str], **given: Any) -> list[Image.Image]:
    ask = {"num_inference_steps": 256, "scheduler": "top_p", "guidance_scale": model.card.defaults.guidance_scale}
    return pictures(
        model, [(asked(model, prompt=one, seed=i, **ask | given), NOTHING) for i, one in enumerate(captions)]
    )


def over(model: Any, scorer: Scorer, field: str, values: tuple[float, ...]) -> list[tuple[float, float]]:
    curve = list[tuple[float, float]]()
    for value in values:
        curve.append((value, agreement(scorer, row(model, SOME, **{field: value}), SOME)))
        print(f"| {model.card.name} | {field} {value:g} | {curve[-1][1]:.3f} |", flush=True)
    return curve


def main() -> None:
    scorer, dalle, parti = Scorer(), resident("emoji-dalle"), resident("emoji-parti")
    print("| model | | CLIP agreement |\n|---|---|---|")
    scales = {model.card.name: over(model, scorer, "guidance_scale", SCALES) for model in (parti, dalle)}
    chosen = {"emoji-dalle": over(dalle, scorer, "best_of", CANDIDATES)}
    draw(
        [
            Panel("CLIP agreement, logits guided", "guidance_scale", scales),
            Panel("CLIP agreement, the best of so many", "best_of", chosen),
        ],
        DOCS / "tokens.png",
    )
    sheet([row(dalle, SHOWN), row(dalle, SHOWN, best_of=8)], DOCS / "dalle.png")
    sheet([row(parti, SHOWN, guidance_scale=1.0), row(parti, SHOWN)], DOCS / "parti.png")


if __name__ == "__main__":
    main()
