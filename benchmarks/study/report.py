"""(to come)"""


def update(rows, root, check=False):
    return 0
