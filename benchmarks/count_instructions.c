/* A plugin for qemu (7.2 to 8.2) that prints how many instructions a program has executed; see arm_instructions.py. What
   it uses of qemu-plugin.h, a header that few systems install, is declared here. */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

typedef uint64_t Id;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, struct qemu_plugin_tb*));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, void (*)(unsigned, void*), int, void*);
extern void qemu_plugin_register_atexit_cb(Id, void (*)(Id, void*), void*);

int qemu_plugin_version = 1;

static uint64_t count;

static void executed(unsigned cpu, void* instructions) {
  (void)cpu;
  count += (uintptr_t)instructions;
}

static void translated(Id id, struct qemu_plugin_tb* block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(block, executed, 0, (void*)qemu_plugin_tb_n_insns(block));
}

static void at_exit(Id id, void* nothing) {
  (void)id, (void)nothing;
  fprintf(stderr, "%" PRIu64 "\n", count);
}

int qemu_plugin_install(Id id, const void* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, at_exit, NULL);
  return 0;
}
