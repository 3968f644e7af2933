"""``bouquet report``: run folders in, one self-contained page out."""
