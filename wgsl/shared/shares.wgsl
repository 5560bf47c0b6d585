// The rows of a loss, shared out: a workgroup adds up `of_row` over {{ each }} of them, an invocation over at most
// {{ (each + lanes - 1) // lanes }}, in blocks of {{ block }}.
{# Inside: of_row is called for row < rows. `parts` has a row for each workgroup. #}
fn share(group: u32, lid: u32) -> vec4<f32> {
    let end = min((group + 1u) * {{ each }}u, {{ rows }}u);
    var sums = vec4<f32>();
    for (var begin = group * {{ each }}u + lid; begin < end; begin += {{ block * lanes }}u) {
        let stop = min(begin + {{ block * lanes }}u, end);
        var part = vec4<f32>();
        for (var row = begin; row < stop; row += {{ lanes }}u) {
            part += of_row(row);
        }
        sums += part;
    }
    return reduce(sums, lid);
}
{% if groups > 1 %}

fn store_part(group: u32, lid: u32, sums: vec4<f32>) {
    if (lid == 0u && group < {{ groups }}u) {
        parts_store(group * parts_stride, sums);
        for (var col = 1u; col < parts_stride; col++) {
            parts_store(group * parts_stride + col, vec4<f32>());
        }
    }
}
{% endif %}
