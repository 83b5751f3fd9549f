"""Bring the images of OBELICS, which are published as URLs, to where tools.pack finds them.

    python -m tools.obelics obelics/data --urls urls.txt
    img2dataset --url_list urls.txt --input_format txt --output_format files \\
        --output_folder fetched --image_size 256 --resize_mode keep_ratio
    python -m tools.obelics obelics/data --fetched fetched
    python -m tools.pack --interleaved obelics/data ...

The first lists the URLs that the parquet files of a folder name, the last moves each image that
img2dataset has fetched to images/ in that folder, under a name that follows from its URL. So no
list of hundreds of millions of URLs has to be in memory, and the command may be stopped and given
again. Needs the package pyarrow.
"""
from pathlib import Path

from tqdm import tqdm

from data import check
from tools import need
from tools.pack import file_of_url
from train import Parser


def parquet_files(folder, remedy):
    files = sorted(folder.glob("*.parquet"))
    check(files, f"{folder} has no .parquet file: {remedy}")
    return files


def batches(files, columns):
    """Yields (file, {column: values}) of some thousand rows at a time."""
    parquet = need("pyarrow.parquet", "pyarrow")
    for path in tqdm(files, "files", disable=None):
        for batch in parquet.ParquetFile(path).iter_batches(4096, columns=columns):
            yield path, batch.to_pydict()


def list_urls(folder, out):
    """Writes the URLs in a folder's parquet files to a file, one a line; returns their number."""
    files, n = parquet_files(folder, "name the folder of OBELICS' data"), 0
    with open(out, "w", encoding="utf-8") as file:
        for _, rows in batches(files, ["images"]):
            urls = dict.fromkeys(url for images in rows["images"] for url in images if url)
            file.writelines(f"{url}\n" for url in urls)
            n += len(urls)
    return n


def take_images(folder, fetched):
    """Moves what img2dataset wrote as files (beside each folder of images lies a parquet file that
    says which URL each is of) to folder/images; returns how many images are there now, of how many
    that were asked for."""
    files, n, here = parquet_files(fetched, "name the --output_folder of img2dataset"), 0, 0
    for path, rows in batches(files, ["url", "key"]):
        for url, key in zip(rows["url"], rows["key"]):
            image = path.with_suffix("") / f"{key}.jpg"
            place = folder / "images" / file_of_url(url)
            if image.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                image.replace(place)
            n, here = n + 1, here + place.is_file()
    return here, n


def main(argv=None):
    parser = Parser(prog="python -m tools.obelics", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the parquet files of OBELICS lie")
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--urls", type=Path, metavar="FILE", help="list the URLs of images here")
    step.add_argument("--fetched", type=Path, help="take the images from this folder")
    args = parser.parse_args(argv)
    if args.urls:
        print(f"{list_urls(args.folder, args.urls):,} URLs in {args.urls}")
    else:
        here, n = take_images(args.folder, args.fetched)
        print(f"{here:,} of {n:,} images are in {args.folder / 'images'}; tools.pack skips and "
              "counts the others")


if __name__ == "__main__":
    main()
