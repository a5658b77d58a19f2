"""bitsandbytes' idle message stays out of terminals; everything else that it says is heard."""

import logging

from trainer.quantize import quiet_bitsandbytes


def test_only_the_message_of_the_idle_kernel_is_kept_out(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    quiet_bitsandbytes()
    quiet_bitsandbytes()
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "nothing")
    logger.warning("the library was built for another card")
    assert caplog.messages == ["the library was built for another card"]
