/* test_file_watch.c - a model file that is written over while it is in use: qemb_file_check tells,
 * no vector comes out, and the tokenizer keeps its tables. What a truncated map does to a program.
 */
#include "support.h"

#include "frontends/console.h"
#include "frontends/map_fault.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char path[64];
static size_t bytes;
static qemb_file *file;

/* Sets the time of modification to a time long past. Clocks of files tick every few ms: a write in
 * the tick of the one before would not show. */
static void make_old(void) {
    const struct timespec times[] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000000000}};
    cr_assert_eq(utimensat(AT_FDCWD, path, times, 0), 0);
}

static void setup(void) {
    qemb_err err;
    uint8_t *model = make_model(&small_configs[1], 7, 1, &bytes);
    write_temporary(path, model, bytes);
    free(model);
    make_old();
    cr_assert_eq(qemb_file_open(&file, path, &err), 0, "%s", err.msg);
}

static void teardown(void) {
    qemb_file_close(file);
    unlink(path);
}

TestSuite(file_watch, .init = setup, .fini = teardown);

/* Writes n bytes of value over the file at `at`. */
static void write_over(size_t at, int value, size_t n) {
    const int fd = open(path, O_WRONLY);
    uint8_t *data = malloc(n);
    memset(data, value, n);
    cr_assert_eq(pwrite(fd, data, n, (off_t)at), (ssize_t)n);
    free(data);
    close(fd);
}

static void expect_changed(void) {
    qemb_err err = {0};
    cr_assert_eq(qemb_file_check(file, &err), -1);
    cr_assert_str_eq(err.code, "model_file");
    cr_assert(!strncmp(err.msg, path, strlen(path)) && strstr(err.msg, "written to"), "%s",
              err.msg);
    cr_assert_null(strchr(err.msg, '\n'));
}

Test(file_watch, what_happens_to_the_path_changes_nothing) {
    char other[80];
    qemb_err err;
    cr_assert_eq(qemb_file_check(file, &err), 0);
    snprintf(other, sizeof other, "%s.2", path);
    cr_assert_eq(link(path, other), 0);
    cr_assert_eq(qemb_file_check(file, &err), 0);
    cr_assert_eq(chmod(path, 0400), 0);
    cr_assert_eq(rename(other, path), 0); /* of two links to a file, changes nothing */
    unlink(other);
    const int fd = open(other, O_WRONLY | O_CREAT, 0600); /* mv of another file over it */
    cr_assert_eq(write(fd, "new", 3), 3);
    close(fd);
    cr_assert_eq(rename(other, path), 0);
    cr_assert_eq(qemb_file_check(file, &err), 0);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(qemb_file_check(file, &err), 0);
}

Test(file_watch, a_write_in_place) {
    write_over(bytes / 2, 1, 1);
    expect_changed();
    expect_changed(); /* it stays so */
}

Test(file_watch, a_truncation) {
    cr_assert_eq(truncate(path, (off_t)bytes - 1), 0);
    make_old(); /* the size alone tells */
    expect_changed();
}

Test(file_watch, bytes_behind_the_end) {
    write_over(bytes, 0, 1);
    make_old();
    expect_changed();
}

Test(file_watch, a_nanosecond) {
    const struct timespec times[] = {{.tv_nsec = UTIME_OMIT},
                                     {.tv_sec = 1000000000, .tv_nsec = 1}};
    cr_assert_eq(utimensat(AT_FDCWD, path, times, 0), 0);
    struct stat st;
    stat(path, &st);
    if (st.st_mtim.tv_nsec == 1) expect_changed(); /* else the file system counts in more */
}

static qemb_model *opened(void) {
    qemb_model *m;
    qemb_err err;
    cr_assert_eq(qemb_open(&m, file, qemb_cpu_choose(NULL, QEMB_MATH_F32), NULL, &err), 0, "%s",
                 err.msg);
    return m;
}

/* out = the vector of a text */
static void embed(qemb_model *m, float *out) {
    static const int32_t ids[] = {3, 17, 4};
    qemb_batch *b = qemb_batch_new(m);
    cr_assert_eq(qemb_pack_add(b, ids, 3), 0);
    qemb_embed(m, b, out);
    qemb_batch_free(b);
}

Test(file_watch, no_vector_comes_after_a_write) {
    float out[64];
    qemb_model *m = opened();
    embed(m, out);
    cr_assert(isfinite(out[0]) && !qemb_health_of(m).failure);
    write_over(bytes - 4, 1, 4);
    for (int i = 0; i < 2; i++) {
        embed(m, out);
        for (int d = 0; d < small_configs[1].hidden; d++) cr_assert(isnan(out[d]), "number %d", d);
        cr_assert(strstr(qemb_health_of(m).failure, "written to"));
    }
    make_old(); /* who noticed does not forget */
    embed(m, out);
    cr_assert(isnan(out[0]) && qemb_health_of(m).failure);
    qemb_close(m);
}

Test(file_watch, no_model_opens_over_a_changed_file) {
    qemb_model *m = NULL;
    qemb_err err;
    write_over(bytes - 4, 1, 4);
    cr_assert_eq(qemb_open(&m, file, qemb_cpu_choose(NULL, QEMB_MATH_F32), NULL, &err), -1);
    cr_assert_str_eq(err.code, "model_file");
    cr_assert_null(m);
}

/* A tokenizer over a changed table would index with numbers that nothing has checked. */
Test(file_watch, the_tokenizer_keeps_its_tables) {
    qemb_tokenizer *t;
    qemb_tokenizer_result r;
    qemb_err err;
    char text[1000]; /* a long pre-token, of which every merge is applied by its pair */
    memset(text, 'a', sizeof text); /* make_model's merge joins ids 64 and 65, a and b */
    for (size_t i = 1; i < sizeof text; i += 2) text[i] = 'b';
    cr_assert_eq(qemb_file_tokenizer(&t, file, &err), 0, "%s", err.msg);
    qemb_tokenizer_state *s = qemb_tokenizer_state_new(t), *fresh = qemb_tokenizer_state_new(t);
    cr_assert_eq(qemb_tokenizer_encode(s, text, sizeof text, sizeof text, &r, &err), 0);
    const size_t n = r.n;
    int32_t *ids = malloc(n * sizeof *ids);
    memcpy(ids, r.ids, n * sizeof *ids);
    write_over(4096, 0xee, bytes - 4096);
    cr_assert_eq(qemb_tokenizer_encode(fresh, text, sizeof text, sizeof text, &r, &err), 0);
    cr_assert(r.n == n && n < sizeof text);
    cr_assert_arr_eq(r.ids, ids, n * sizeof *ids);
    cr_assert_str_eq(qemb_file_prompt(file, "query"), "Instruct: find\nQuery:");
    free(ids);
    qemb_tokenizer_state_free(s), qemb_tokenizer_state_free(fresh);
    qemb_tokenizer_close(t);
}

Test(file_watch, an_embedder_says_why) {
    const qemb_text_options o = {.dim = 32};
    const char *const text = "word";
    const size_t len = 4;
    float out[64];
    qemb_embedder *e;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, path, NULL, NULL, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_embed_texts(e, &o, &text, &len, 1, out, &err), 1, "%s", err.msg);
    write_over(bytes - 4, 1, 4);
    cr_assert_eq(qemb_embed_texts(e, &o, &text, &len, 1, out, &err), -1);
    cr_assert_str_eq(err.code, "model_file", "%s", err.msg);
    qemb_embedder_close(e);
}

/* ---- truncated maps -------------------------------------------------------------------------- */

/* Runs f in a child. Returns its wait status; said (256) = what it wrote to standard error. */
static int run_apart(void (*f)(void), char *said) {
    int ends[2], status;
    cr_assert_eq(pipe(ends), 0);
    const pid_t child = fork();
    if (!child) {
        dup2(ends[1], STDERR_FILENO);
        f();
        _exit(99);
    }
    close(ends[1]);
    const ssize_t n = read(ends[0], said, 255);
    said[n > 0 ? n : 0] = 0;
    close(ends[0]);
    cr_assert_eq(waitpid(child, &status, 0), child);
    return status;
}

static void read_the_lost_end(void) {
    cr_assert_eq(truncate(path, 4096), 0);
    const volatile uint8_t *last = file->map + file->map_bytes - 1;
    (void)*last;
}

static void read_the_end(void) {
    signal(SIGBUS, SIG_DFL); /* not criterion's */
    map_fault_watch(file->map, file->map_bytes, "a\tname\033");
    read_the_lost_end();
}

static void read_a_forgotten_one(void) {
    signal(SIGBUS, SIG_DFL);
    map_fault_watch(file->map, file->map_bytes, path);
    map_fault_forget(file->map);
    read_the_lost_end();
}

static void read_while_opening(void) {
    signal(SIGBUS, SIG_DFL);
    map_fault_opening(path);
    read_the_lost_end();
}

static void read_when_opened(void) {
    signal(SIGBUS, SIG_DFL);
    map_fault_opening(path);
    map_fault_opening(NULL);
    read_the_lost_end();
}

static void get_the_signal(void) {
    signal(SIGBUS, SIG_DFL);
    map_fault_watch(NULL, SIZE_MAX, path); /* any address */
    map_fault_watch(file->map, file->map_bytes, path);
    kill(getpid(), SIGBUS);
}

Test(file_watch, a_truncated_map_ends_the_process_with_a_line) {
    char said[256];
    int status = run_apart(read_the_end, said);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == STATUS_MODEL, "status %x", status);
    cr_assert_str_eq(said, "qemb: a\tname?: cannot be read: truncated while it was in use, or its "
                           "disk fails\n");
    status = run_apart(read_a_forgotten_one, said);
    cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS && !*said, "status %x", status);
    status = run_apart(read_while_opening, said);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == STATUS_MODEL, "status %x", status);
    cr_assert(strstr(said, ": cannot be read: "));
    status = run_apart(read_when_opened, said);
    cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS && !*said, "status %x", status);
    status = run_apart(get_the_signal, said);
    cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS && !*said, "status %x", status);
}
