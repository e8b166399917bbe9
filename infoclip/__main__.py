"""``python -m infoclip``, which ``torchrun -m infoclip`` starts in each of its processes."""

from infoclip.cli import main

if __name__ == "__main__":
    main()
