# Builds fuseclient/answer.bpf.o, which lies beside the Python package so that it is found at run time. Included by the
# Makefile at the top; alone: make -f bpf/build.mk
CLANG ?= clang
BPF_ARCH := $(patsubst aarch64,arm64,$(patsubst x86_64,x86,$(shell uname -m)))
BPF_CFLAGS := -O2 -g -ffreestanding -mcpu=v3 -target bpf -D__TARGET_ARCH_$(BPF_ARCH) \
	-Wall -Wextra -Werror -I/usr/include/$(shell uname -m)-linux-gnu

fuseclient/answer.bpf.o: $(wildcard bpf/*.c bpf/*.h) bpf/build.mk
	$(CLANG) $(BPF_CFLAGS) -c bpf/answer.bpf.c -o $@.new
	llvm-strip -g $@.new
	mv $@.new $@
