"""The agent: an initramfs with vminit for machines whose drive holds any distribution, or nothing.

For the drivers of virtual machines: `agent_image` makes the file, `kernel_arguments` the command line, and
`AgentReport` reads how the machine ended.
"""

from firebuild_bootstrap.agent.arguments import EMULATED, StaticAddress, kernel_arguments
from firebuild_bootstrap.agent.compress import Compression
from firebuild_bootstrap.agent.image import agent_image
from firebuild_bootstrap.agent.report import AgentReport

__all__ = ["EMULATED", "AgentReport", "Compression", "StaticAddress", "agent_image", "kernel_arguments"]
