/* What runs before main on a Cortex-M7: the vector table, the floating-point unit, .data and .bss. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern uint32_t data_in_flash[], data_start[], data_end[], bss_start[], bss_end[], stack_top[];
extern void initialise_monitor_handles(void);
int main(void);

void _init(void);
void _fini(void);
void reset(void);

void _init(void)
{
}

void _fini(void)
{
}

static void fault(void)
{
    _Exit(3);
}

void reset(void)
{
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: the floating-point unit is on */
    memcpy(data_start, data_in_flash, (size_t)((uint8_t *)data_end - (uint8_t *)data_start));
    memset(bss_start, 0, (size_t)((uint8_t *)bss_end - (uint8_t *)bss_start));
    initialise_monitor_handles();
    exit(main());
}

typedef void (*handler)(void);

__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    handler handlers[15];
} vectors = {stack_top, {reset, fault, fault, fault, fault, fault}};
