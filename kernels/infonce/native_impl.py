from infoclip.native import why_not
