"""Takes the documentation's pictures of the runs in this folder: `make pictures`, once there are some to show."""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import find, mlflow_page, picture
from tests.pipeline.clones import Clone

FOLDER = Path("docs/pictures")
ASSISTANT = 0.74  # of the width: what is right of it is MLflow's assistant, which opens with the first visit


def main() -> None:
    browser = find()
    if browser is None:
        raise SystemExit("no Chromium or Chrome here; `apt-get install chromium` brings one")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with mlflow_page(Clone(Path.cwd())) as address:
        for name, mode, height in (("runs", "", 690), ("curves", "&compareRunsMode=CHART", 1000)):
            path = FOLDER / f"{name}.png"
            picture(browser, address + mode, path, width=1900, height=height)
            image = Image.open(path)
            image.crop((0, 0, int(image.width * ASSISTANT), image.height)).convert("P", palette=Image.ADAPTIVE).save(
                path
            )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "comparison.html"
        subprocess.run([sys.executable, "-m", "tools", "compare", "--html", str(page)], check=True)
        picture(browser, page.as_uri(), FOLDER / "comparison.png", width=1280, height=900)


if __name__ == "__main__":
    main()
