"""Pictures and pages: class colours, overlays with legend, curves, and one self-contained HTML report."""
