"""B's gradient in the two layouts, over the base's own product: 1,024 tokens, 576 x 576, r=8.

python bench/layout.py
"""

import torch
from common import finish, interleaved, table

TOKENS, WIDTH, RANK = 1024, 576, 8


def main() -> None:
    torch.manual_seed(0)
    x, dy, weight = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, WIDTH)
    xa = torch.randn(TOKENS, RANK)  # autograd's x A^T
    xa_t = xa.t().contiguous()  # ours
    times = interleaved(
        {"base": lambda: x @ weight, "(out, r)": lambda: dy.t() @ xa, "(r, out)": lambda: xa_t @ dy}, 101
    )
    rows = [(name, seconds * 1e6, seconds / times["base"]) for name, seconds in times.items()]
    finish("layout", {"seconds": times}, table(("product", "us", "over the base's"), rows))


if __name__ == "__main__":
    main()
