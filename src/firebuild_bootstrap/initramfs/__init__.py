"""The initramfs with vminit, for machines whose drive holds any distribution, or nothing.

For the drivers of virtual machines: `initramfs_image` makes the file, `kernel_arguments` the command line,
and `GuestReport` reads how the machine ended.
"""

from firebuild_bootstrap.initramfs.boot import EMULATED, GuestReport, StaticAddress, kernel_arguments
from firebuild_bootstrap.initramfs.image import Compression, initramfs_image

__all__ = ["EMULATED", "Compression", "GuestReport", "StaticAddress", "initramfs_image", "kernel_arguments"]
