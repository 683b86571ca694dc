"""The gallery: small copies of the studies' pictures, and the page around them.

`make gallery` takes what `make bench-images` left in outputs/, the best preset where there is one. Digits only:
pictures of faces stay where they were made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PAGE = Path("docs/gallery.md")
FOLDER = Path("docs/gallery")
WIDEST = 760
COLOURS = 64


@dataclass(frozen=True)
class Exhibit:
    """One picture: the study it is of, its name there, a title, and what to see in it."""

    study: str
    picture: str
    title: str
    text: str


EXHIBITS = (
    Exhibit("digits-mnist", "samples", "Digits drawn by class", "One row per class, z from its aggregate posterior."),
    Exhibit(
        "digits-mnist",
        "styles",
        "The same hand writes every digit",
        "Every column has one z, drawn as training images have it: slant and stroke stay, the class changes.",
    ),
    Exhibit("digits-mnist", "written_2026", "A number, typed, written by hand", "`--write 2026`: five hands."),
    Exhibit(
        "digits-mnist",
        "edits",
        "Another class, the same style",
        "The first column is an unseen digit; the others are it under every class (`edit`).",
    ),
    Exhibit(
        "digits-mnist",
        "reconstructions",
        "Reconstructions, with and without the class",
        "CVAE beside a plain VAE of the same size.",
    ),
    Exhibit(
        "digits-mnist",
        "latent_map",
        "The latent plane, Q(z | x, c)",
        "A model with two latent units: told the class, it keeps little of it in z; every class lies about N(0, I).",
    ),
    Exhibit(
        "digits-mnist",
        "latent_grids",
        "What lies where",
        "The same model's plane under the first two classes: the same place is the same style.",
    ),
    Exhibit(
        "digits-mnist",
        "wrong_labels",
        "Wrong labels",
        "Found by the contrast among test digits with false claims; red: the pixels that cost most under the claim.",
    ),
    Exhibit(
        "digits-fashion_mnist",
        "styles",
        "The same z, other clothes",
        "Fashion-MNIST: what a column shares is brightness and breadth.",
    ),
    Exhibit(
        "completion",
        "completions",
        "The rest of a digit",
        "One, two or three quadrants seen, the rest drawn several times.",
    ),
    Exhibit(
        "one_class_images_fashion_mnist",
        "class_6",
        "One class against the rest",
        "Shirts: those that look least like one, and what else looks most like one; red: the pixels that are off.",
    ),
    Exhibit(
        "one_class_images_mnist",
        "damages",
        "Damaged digits",
        "What the networks of one class each are to find beside other classes.",
    ),
    Exhibit("ood_images", "parts", "Another kind of image", "The parts of the negative ELBO, clothes against digits."),
)


def main() -> None:
    """Copy what is there and write the page."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sections = [section(exhibit) for exhibit in EXHIBITS]
    there = [text for text in sections if text]
    if not there:
        raise SystemExit("outputs/ has no study's pictures: run `make bench-images DATA=FOLDER` first")
    PAGE.write_text("\n".join([HEAD, *there]), encoding="utf-8")
    print(f"written: {PAGE}, {len(there)} of {len(EXHIBITS)} pictures")


def section(exhibit: Exhibit) -> str:
    """One picture with its text; nothing where the study has not been run."""
    for preset in ("best", "fast"):
        source = Path("outputs") / exhibit.study / preset / f"{exhibit.picture}.png"
        if source.is_file():
            name = f"{exhibit.study}_{exhibit.picture}.png"
            shrink(source, FOLDER / name)
            return f"## {exhibit.title}\n\n![{exhibit.title}](gallery/{name})\n\n{exhibit.text} *({preset} preset)*\n"
    return ""


def shrink(source: Path, target: Path) -> None:
    """A copy of at most `WIDEST` pixels across and `COLOURS` colours."""
    with Image.open(source) as picture:
        small = picture.convert("RGB")
        if small.width > WIDEST:
            small = small.resize((WIDEST, round(small.height * WIDEST / small.width)), Image.Resampling.LANCZOS)
        small.quantize(COLOURS).save(target, optimize=True)


HEAD = """# Gallery

Made by `make bench-images DATA=FOLDER` and `make gallery`; each study is one command ([images](images.md)), its
numbers are in the [figures](benchmarks/images.md). MNIST: Y. LeCun, C. Cortes, C. J. C. Burges; Fashion-MNIST: Zalando
Research (MIT).
Faces can be made on one's own machine (`pipelines/faces.py`) and are not shown.
"""

if __name__ == "__main__":
    main()
