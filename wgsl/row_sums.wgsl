// The sum of every row, or of every piece of {{ each }} vec4s of a row where it has several: `lanes` invocations each. Padding is zero and may
// be read. An invocation adds up at most {{ (each + lanes - 1) // lanes }} vec4s, in blocks of {{ block }}.
{# Inside: row is at most the last one, col < used. y has an element for each row or, with several pieces, a row of
   its own stride with an element for each piece. #}
{% include "shared/group" %}
{% include "shared/reduce" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
{% if pieces > 1 %}
    let piece = min(wanted, {{ rows * pieces - 1 }}u) % {{ pieces }}u;
    let row = min(wanted, {{ rows * pieces - 1 }}u) / {{ pieces }}u;
    let first = piece * {{ each }}u + lane;
    let end = min((piece + 1u) * {{ each }}u, {{ used }}u);
{% else %}
    let row = min(wanted, {{ rows - 1 }}u);
    let first = lane;
    let end = {{ used }}u;
{% endif %}
    var sum = vec4<f32>();
{% if each > block * lanes %}
    for (var begin = first; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part = vec4<f32>();
        for (var col = begin; col < stop; col += {{ lanes }}u) {
            part += x_load(row * x_stride + col);
        }
        sum += part;
    }
{% else %}
    for (var col = first; col < end; col += {{ lanes }}u) {
        sum += x_load(row * x_stride + col);
    }
{% endif %}
    let total = across(reduce(sum, lid));
    if (wanted < {{ rows * pieces }}u && lane == 0u) {
{% if pieces > 1 %}
        y_put(row * y_stride + piece, total);
        if (piece == {{ pieces - 1 }}u) {
            for (var i = {{ pieces }}u; i < y_stride; i++) {
                y_put(row * y_stride + i, 0.0);
            }
        }
{% else %}
        y_put(row, total);
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < y_stride; i++) {
                y_put(i, 0.0);
            }
        }
{% endif %}
    }
}
