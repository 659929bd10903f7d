"""The depth lens: which depths a network reads, recorded as it runs and shown.

.. code-block:: python

    with DepthLens(model) as lens:
        model(inputs)
    report = lens.report()
    write_html(report, "depth.html")  # one page, works offline
    write_png(report, "depth.png")    # needs matplotlib

The command ``flash-attn-res inspect`` does this for a trained run or for any model.
"""

from flash_attn_res.lens.recorder import DepthLens, DepthReport, NetworkReading, SiteReading
from flash_attn_res.lens.views import figure, html, write_html, write_json, write_png

__all__ = [
    "DepthLens",
    "DepthReport",
    "NetworkReading",
    "SiteReading",
    "figure",
    "html",
    "write_html",
    "write_json",
    "write_png",
]
