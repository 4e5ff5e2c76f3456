"""The libraries that draw the charts in the page: Vega, Vega-Lite and vega-embed as one script."""

import hashlib
from contextlib import suppress
from importlib.metadata import version

import altair as alt
import vl_convert

from foreshock.core import files
from foreshock.core.errors import RunFolderError
from foreshock.proxy.data.cache import cache_folder

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
"""The Vega-Lite that Altair writes for."""
_GLOBALS = "window.vegaEmbed = vegaEmbed;"
"""What the page's own script uses of the libraries."""


def libraries() -> str:
    """The script. Bundling it takes more than a second, so it is kept in the cache folder, with its checksum."""
    kept = cache_folder() / "vega" / f"{VEGA_LITE}-{version('vl-convert-python')}.js"
    with suppress(OSError, ValueError):
        checksum, _, script = kept.read_text(encoding="utf-8").partition("\n")
        if checksum == _checksum(script):
            return script
    script = str(vl_convert.javascript_bundle(_GLOBALS, VEGA_LITE))
    with suppress(RunFolderError):  # without a cache it is bundled again the next time
        files.make_folder(kept.parent)
        files.write_atomic(kept, f"{_checksum(script)}\n{script}")
    return script


def _checksum(script: str) -> str:
    return "// " + hashlib.sha256((_GLOBALS + script).encode()).hexdigest()
