"""Merge models: ``python src/merge.py configs/merges/recover.yaml merges/recovered``."""

import argparse
import re
import sys

from smol.cli import user_message
from smol.errors import UserError
from smol.paths import find, resolve

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 after a mistake."""
    parser = argparse.ArgumentParser(description="Merge models into a Hugging Face folder.")
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, as in configs/merges")
    parser.add_argument("output", metavar="OUTPUT", help="new Hugging Face folder")
    parser.add_argument("--seed", type=int, default=0, help="of what is dropped at random (0)")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weights file (5GB)")
    parser.add_argument("--force", action="store_true", help="replace an earlier merge")
    args = parser.parse_args(arguments)
    try:
        from smol.merging import load_recipe, merge

        size = _bytes(args.max_shard_size)
        output = resolve(args.output)
        recipe = load_recipe(find(args.recipe))
        merge(recipe, output, seed=args.seed, file_bytes=size, force=args.force)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+) ?([KMG]B)?", size.upper())
    if found is None or int(found[1]) == 0:
        raise UserError(f"--max_shard_size is {size}; expected bytes, such as 500MB or 5GB")
    return int(found[1]) * UNITS[found[2] or ""]


if __name__ == "__main__":
    sys.exit(main())
